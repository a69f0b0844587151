"""The kinds of pictures that are drawn, known before matplotlib is there."""

IMAGE_TYPES = ("png", "svg", "pdf")
