"""What holds for a model: the laws of the sites, and hk.doctor."""
