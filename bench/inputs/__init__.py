"""What is fed to layers: texts, loads of known skew, and weights."""
