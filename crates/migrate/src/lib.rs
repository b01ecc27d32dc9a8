//! limosa-migrate
