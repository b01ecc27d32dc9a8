//! limosa-puppet
