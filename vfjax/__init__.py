"""vfjax: align, merge, repair and diagnose trained networks, straight from their jaxprs."""
