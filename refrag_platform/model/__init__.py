"""The REFRAG model (section 2): encoder, projection, an untouched decoder, and the policy that expands chunks."""
