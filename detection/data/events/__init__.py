"""Recordings of event cameras: files, frames, boxes, and sets that are made."""

from detection.data.events.files import list_recordings, read_events, read_recording, read_windows
from detection.data.events.frames import events_to_frames, filter_boxes, frames_to_pixels, label_times
from detection.data.events.made import draw_classified, draw_recordings
from detection.data.events.prophesee import BOX, EVENT, Recording, read_boxes, write_boxes, write_events

__all__ = [
    "BOX",
    "EVENT",
    "Recording",
    "draw_classified",
    "draw_recordings",
    "events_to_frames",
    "filter_boxes",
    "frames_to_pixels",
    "label_times",
    "list_recordings",
    "read_boxes",
    "read_events",
    "read_recording",
    "read_windows",
    "write_boxes",
    "write_events",
]
