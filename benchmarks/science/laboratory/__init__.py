"""Federated training on frozen states, without Flower: the product's arithmetic, all clients of all seeds at once."""
