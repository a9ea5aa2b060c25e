"""What a method answers and saves, measured against full prefill."""
