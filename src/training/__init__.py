"""Training: LightningModules that drive a model and log what it reports. They compute no mathematics and name no model."""
