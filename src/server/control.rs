//! The operations of the control API, a signal or a changed file: reload, drain, log rotation, handover.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use super::log_writer::LogReopener;
use super::notify;
use super::reload::ReloadError;
use super::takeover::TakeoverProcess;
use crate::account::lock;
use crate::admin::control::{self, RefusalDetail, ReloadRefusal, ReloadSummary};
use crate::config::{Config, ConfigErrors};
use crate::handover::give::Handover;

/// Carries out the operations of the control API.
#[derive(Debug)]
pub struct ProcessControl {
    process: Arc<TakeoverProcess>,
    /// The file that the process was started with.
    source: Option<PathBuf>,
    /// One reload at a time, from reading to the end: what was read last is in force.
    serial: Mutex<()>,
    handover: Arc<Handover>,
    /// While the access log is a file that is written.
    access_log: Mutex<Option<Arc<LogReopener>>>,
}

impl ProcessControl {
    pub(super) fn new(process: Arc<TakeoverProcess>, source: Option<PathBuf>, handover: Handover) -> Self {
        let (serial, access_log) = (Mutex::default(), Mutex::default());
        Self { process, source, serial, handover: Arc::new(handover), access_log }
    }

    /// Sets the access log to reopen.
    pub(super) fn set_access_log(&self, log: Option<LogReopener>) {
        *lock(&self.access_log) = log.map(Arc::new);
    }

    /// Why a successor that this process starts would end with it, and what to do instead; `None` where it would not.
    #[must_use]
    pub fn takeover_obstacle(&self) -> Option<&str> {
        self.handover.obstacle()
    }

    fn read(&self) -> Result<Config, ReloadRefusal> {
        let Some(source) = &self.source else {
            self.process.live.reloads.refuse();
            return Err(refused_for("no configuration file to reload: the process was started without one"));
        };
        Config::load(source).map_err(|faults| {
            self.process.live.reloads.refuse();
            ReloadRefusal::from(&faults)
        })
    }

    fn put_in_force(&self) -> Result<ReloadSummary, ReloadRefusal> {
        if self.handover.is_busy() {
            self.process.live.reloads.refuse();
            return Err(refused_for(&ReloadError::TakeoverInProgress.to_string()));
        }
        let config = Arc::new(self.read()?);
        self.process.reloader.reload(&config).map_err(|error| refused_for(&error.to_string()))?;
        Ok(ReloadSummary {
            listeners: config.listeners.len(),
            pools: config.pools.len(),
            tenants: config.tenants.len(),
            access_log: None,
        })
    }
}

impl control::Control for ProcessControl {
    fn reload(&self) -> Result<ReloadSummary, ReloadRefusal> {
        let _turn = lock(&self.serial);
        // After STOPPING=1 systemd accepts no other state.
        let goes = self.process.live.is_draining();
        if !goes {
            notify::reloading();
        }
        let mut reloaded = self.put_in_force();
        // Also if the reload is refused: a renamed log must be reopened even if the configuration is invalid.
        let reopened = self.reopen_access_log();
        match &mut reloaded {
            // The reload itself logs the change.
            Ok(reloaded) => reloaded.access_log = reopened.err(),
            Err(ReloadRefusal { faults }) => {
                for fault in faults.iter() {
                    tracing::error!("{}", fault.text);
                }
                tracing::error!(faults = faults.len(), "reload refused; the configuration in force stays");
                let reopening = reopened.err().map(|text| refused_for(&text).faults);
                faults.extend(reopening.unwrap_or_default());
            }
        }
        // Also if the reload was refused: the process continues to serve.
        if !goes {
            notify::ready();
        }
        reloaded
    }

    fn reopen_access_log(&self) -> Result<(), String> {
        let log = lock(&self.access_log).clone();
        log.map_or(Ok(()), |log| log.reopen())
    }

    fn drain(&self) {
        self.process.drain.send_replace(true);
    }

    fn hand_over(&self, to: UnixStream) {
        let handover = Arc::clone(&self.handover);
        let spawned = std::thread::Builder::new().name("takeover".to_owned()).spawn(move || handover.run(to));
        if let Err(error) = spawned {
            tracing::error!(%error, "takeover failed; this process continues");
        }
    }
}

impl From<&ConfigErrors> for ReloadRefusal {
    fn from(faults: &ConfigErrors) -> Self {
        let fault = |fault: &crate::config::ConfigError| RefusalDetail {
            file: Some(fault.file().to_owned()),
            line: fault.line(),
            text: fault.to_string(),
        };
        Self { faults: faults.iter().map(fault).collect() }
    }
}

/// A refusal that no line is at fault of: each line of the text is a fault.
fn refused_for(text: &str) -> ReloadRefusal {
    let fault = |text: &str| RefusalDetail { file: None, line: None, text: text.to_owned() };
    ReloadRefusal { faults: text.lines().map(fault).collect() }
}
