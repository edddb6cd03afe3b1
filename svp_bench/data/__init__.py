"""Data: split files, readers, transforms, augmentation, the data module, and synthetic images."""
