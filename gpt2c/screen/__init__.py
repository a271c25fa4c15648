"""What a person watches: terminal, progress, pictures. Knows no model."""
