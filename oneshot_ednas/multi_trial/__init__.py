"""Multi-trial search: architectures are proposed, trained one by one, and scored."""
