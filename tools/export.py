#!/usr/bin/env python3
"""`hoyer-det export`."""

import detection.cli

if __name__ == "__main__":
    detection.cli.main(verb="export")
