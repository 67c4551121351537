"""Classification of whole data sets: sources of images, processes that run them, and files of results."""
