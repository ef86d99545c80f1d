"""Parameter trees by path, and means of trees."""
