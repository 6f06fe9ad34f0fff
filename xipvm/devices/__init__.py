"""Device models and the bus they sit on."""
