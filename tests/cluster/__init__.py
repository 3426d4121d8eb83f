"""A real Kubernetes of several nodes on one machine, for end-to-end tests; see README.md."""
