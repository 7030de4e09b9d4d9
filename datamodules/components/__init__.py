"""What data sets are made of: files and zips, decoding, packing, order, loading, augmentation."""
