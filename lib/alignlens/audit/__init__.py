"""Any base and its aligned checkpoint: request, measurements, verdict, page."""
