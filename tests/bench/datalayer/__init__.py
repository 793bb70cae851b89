"""What the bench of the data layer measures: material, formats of others, sections."""
