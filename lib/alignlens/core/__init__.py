"""What every package needs: errors, settings, the store, statistics, style."""
