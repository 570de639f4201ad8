#!/usr/bin/env python3
"""`hoyer-det zoo`."""

import detection.cli

if __name__ == "__main__":
    detection.cli.main(verb="zoo")
