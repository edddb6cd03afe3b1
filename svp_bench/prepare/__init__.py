"""Build, verify and describe the data folders and weights that runs read."""
