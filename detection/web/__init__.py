"""The web page on which one sees trained networks at work: `hoyer-det web`."""
