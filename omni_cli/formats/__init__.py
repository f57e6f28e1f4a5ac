"""What files of the outside world look like: names, columns, units, containers; for readers and the writer alike."""
