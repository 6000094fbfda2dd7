"""The Kubernetes backend: sandboxes as Jobs of a cluster, under a RuntimeClass."""
