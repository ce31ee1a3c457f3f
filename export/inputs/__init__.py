"""What is exported: runs, adapters and calibration text."""
