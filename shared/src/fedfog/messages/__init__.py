"""What travels: schemas, topics and the wire format."""
