"""Raw data sets, turned into the published format by a build file."""
