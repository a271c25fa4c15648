"""Output for a person: terminal, progress, pictures. Knows no model."""
