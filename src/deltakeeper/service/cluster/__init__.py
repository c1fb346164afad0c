"""One service over the nodes of a Ray cluster: an ingress, and replicas that hold the base and some tenants each."""
