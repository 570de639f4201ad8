#!/usr/bin/env python3
"""`hoyer-det analyze`."""

import detection.cli

if __name__ == "__main__":
    detection.cli.main(verb="analyze")
