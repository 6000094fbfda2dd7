"""The client's side of the OCI distribution specification, and images as documents."""
