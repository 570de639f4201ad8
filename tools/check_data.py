#!/usr/bin/env python3
"""`hoyer-det check-data`."""

import detection.cli

if __name__ == "__main__":
    detection.cli.main(verb="check-data")
