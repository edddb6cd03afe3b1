"""Pre-training of the embedded Vim on images that code draws. Not part of the wheel; see README.md here."""
