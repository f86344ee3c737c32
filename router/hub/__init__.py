"""What the Hub and its management API tell us: catalogue, endpoints, Spaces."""
