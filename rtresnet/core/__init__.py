"""What every package uses: errors, artifacts, files, hardware, preprocessing, metrics."""
