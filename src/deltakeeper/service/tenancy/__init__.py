"""Keys, quotas and tenants: what of a service has to be there again after it was killed, and who may ask how much."""
