"""Whether and where sharing helps: accuracies, losses, controls, rivals."""
