"""Training: the Lightning module, the callbacks, and the LightningCLI behind `fit`, `validate` and `test`."""
