"""What a run says of itself to people: the privacy statement and the report page."""
