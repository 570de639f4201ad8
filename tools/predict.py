#!/usr/bin/env python3
"""`hoyer-det predict`."""

import detection.cli

if __name__ == "__main__":
    detection.cli.main(verb="predict")
