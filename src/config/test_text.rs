//! Tables that the configurations of unit tests have in common.

/// A listener. Further keys of it may follow.
pub(crate) const LISTENER: &str = r#"[[listener]]
name = "web"
bind = "0.0.0.0:8080"
trusted-sources = ["10.0.0.0/16"]
pool = "app"
"#;

/// Its pool.
pub(crate) const POOL: &str = r#"[[pool]]
name = "app"
backends = ["10.0.1.10:80"]
"#;
