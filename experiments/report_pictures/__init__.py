"""Pictures of reports for documents."""
