//! limosa-image
