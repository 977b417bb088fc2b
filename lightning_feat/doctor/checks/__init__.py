"""What the doctor looks for."""
