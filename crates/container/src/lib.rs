//! limosa-container
