"""Which version is served: the gate, promotion and the way back, its bytes, its service, training on from it."""
