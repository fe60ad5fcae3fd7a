"""Where denoising moves the singular vectors."""
