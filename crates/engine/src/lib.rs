//! limosa-engine
