//! Which files a configuration is made of, and whether they are as they were: what a watch looks at.

use std::collections::BTreeSet;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::time::SystemTime;

use super::file;

/// The files of a configuration, and the folders in which they come and go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ConfigSources {
    /// The main file and what it includes, each with what the system says of it; `None` where it cannot be looked at.
    files: Vec<(PathBuf, Option<FileStamp>)>,
    /// What to watch: a file is replaced by another one in its folder, and a link by a link in its own.
    pub folders: BTreeSet<PathBuf>,
}

/// What changes when a file is written or replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileStamp {
    device: u64,
    inode: u64,
    len: u64,
    modified: Option<SystemTime>,
    /// Seconds and nanoseconds. It moves even where a copy sets the time of modification back.
    changed: (i64, i64),
}

impl From<Metadata> for FileStamp {
    fn from(metadata: Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            len: metadata.len(),
            modified: metadata.modified().ok(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

impl ConfigSources {
    /// The sources of the configuration in this file, as they are now. Where its `include` cannot be read, those of
    /// `before` count: what a faulty file includes is not known.
    #[must_use]
    pub(crate) fn of(main: &Path, before: &Self) -> Self {
        let patterns = file::includes(main);
        let home = main.parent().unwrap_or(Path::new(""));
        let mut files = vec![main.to_owned()];
        let mut folders = BTreeSet::new();
        if let Some(patterns) = patterns {
            for pattern in patterns {
                files.extend(file::matching(home, &pattern).unwrap_or_default());
                folders.extend(folders_of(home, &pattern));
            }
        } else {
            files.extend(before.files.iter().skip(1).map(|(file, _)| file.clone()));
            folders.clone_from(&before.folders);
        }
        for file in &files {
            folders.extend(parents(file));
        }
        let stamp = |file: PathBuf| {
            let stamp = std::fs::metadata(&file).ok().map(FileStamp::from);
            (file, stamp)
        };
        let folders = folders.into_iter().map(named).filter(|folder| folder.is_dir()).collect();
        Self { files: files.into_iter().map(stamp).collect(), folders }
    }

    /// Whether the files are the same ones, with the same content as far as the system tells.
    #[must_use]
    pub(crate) fn are_as(&self, before: &Self) -> bool {
        self.files == before.files
    }
}

/// The folders that a pattern's files lie in, or would: each folder on the way through its wildcards, and the last one
/// that is there before them.
fn folders_of(home: &Path, pattern: &str) -> Vec<PathBuf> {
    let mut folders = Vec::new();
    let mut prefix = PathBuf::new();
    for component in Path::new(pattern).parent().into_iter().flat_map(Path::components) {
        let next = prefix.join(component);
        if matches!(component, Component::Normal(_)) {
            folders.extend(there(home, &prefix));
        }
        prefix = next;
    }
    folders.extend(there(home, &prefix));
    folders
}

/// The folders that a part of a pattern names.
fn there(home: &Path, part: &Path) -> Vec<PathBuf> {
    match part.to_str() {
        Some("") => vec![home.to_owned()],
        Some(part) => file::matching(home, part).unwrap_or_default(),
        None => Vec::new(),
    }
}

/// The folder of a file, and that of each link that leads to it.
fn parents(file: &Path) -> Vec<PathBuf> {
    /// As many links as Linux follows (`path_resolution(7)`).
    const LINKS: usize = 40;
    let mut parents = Vec::new();
    let mut next = Some(file.to_owned());
    for _ in 0..LINKS {
        let Some(file) = next else { break };
        let parent = file.parent().unwrap_or(Path::new("")).to_owned();
        next = std::fs::read_link(&file).ok().map(|to| parent.join(to));
        parents.push(parent);
    }
    parents.extend(file.canonicalize().ok().and_then(|file| file.parent().map(Path::to_owned)));
    parents
}

/// A folder by a name that the system takes: the working directory has none in a bare file name's parent.
fn named(folder: PathBuf) -> PathBuf {
    if folder.as_os_str().is_empty() { PathBuf::from(".") } else { folder }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn sources(main: &Path) -> ConfigSources {
        ConfigSources::of(main, &ConfigSources::default())
    }

    #[test]
    fn created_removed_or_written_file_is_a_change() {
        let home = tempfile::tempdir().unwrap();
        let main = home.path().join("main.toml");
        fs::write(&main, "include = [\"parts/*.toml\"]\n").unwrap();
        let first = sources(&main);
        assert!(first.folders.contains(home.path()) && first.files.len() == 1, "{first:?}");
        fs::create_dir(home.path().join("parts")).unwrap();
        let part = home.path().join("parts/a.toml");
        let second = sources(&main);
        assert!(second.are_as(&first), "an empty folder says nothing");
        assert!(second.folders.contains(&home.path().join("parts")));
        fs::write(&part, "").unwrap();
        let third = sources(&main);
        assert!(!third.are_as(&second));
        fs::write(home.path().join("parts/notes.txt"), "").unwrap();
        assert!(sources(&main).are_as(&third), "a file that no pattern names is ignored");
        fs::write(&part, "# longer").unwrap();
        assert!(!sources(&main).are_as(&third));
        fs::remove_file(&part).unwrap();
        assert!(sources(&main).are_as(&second));
        // Replaced by rename.
        fs::write(home.path().join("new"), "include = [\"parts/*.toml\"]\n").unwrap();
        fs::rename(home.path().join("new"), &main).unwrap();
        assert!(!sources(&main).are_as(&second));
    }

    #[test]
    fn faulty_main_file_keeps_its_previous_includes() {
        let home = tempfile::tempdir().unwrap();
        let main = home.path().join("main.toml");
        fs::create_dir(home.path().join("parts")).unwrap();
        fs::write(home.path().join("parts/a.toml"), "").unwrap();
        fs::write(&main, "include = [\"parts/*.toml\"]\n").unwrap();
        let before = sources(&main);
        fs::write(&main, "include = [\"parts").unwrap();
        let now = ConfigSources::of(&main, &before);
        assert_eq!((now.files.len(), &now.folders), (2, &before.folders));
        assert!(!now.are_as(&before));
    }

    #[test]
    fn symbolic_link_and_its_target_are_watched() {
        // As a ConfigMap is mounted: the file leads through a link that is replaced as a whole.
        let home = tempfile::tempdir().unwrap();
        for version in ["..v1", "..v2"] {
            fs::create_dir(home.path().join(version)).unwrap();
            fs::write(home.path().join(version).join("main.toml"), "").unwrap();
        }
        symlink("..v1", home.path().join("..data")).unwrap();
        let main = home.path().join("main.toml");
        symlink("..data/main.toml", &main).unwrap();
        let first = sources(&main);
        for folder in ["", "..data"] {
            assert!(first.folders.contains(&home.path().join(folder)), "{folder}: {first:?}");
        }
        symlink("..v2", home.path().join("..next")).unwrap();
        fs::rename(home.path().join("..next"), home.path().join("..data")).unwrap();
        assert!(!sources(&main).are_as(&first));
    }

    #[test]
    fn wildcards_among_folders_are_watched_too() {
        let home = tempfile::tempdir().unwrap();
        let main = home.path().join("main.toml");
        fs::create_dir_all(home.path().join("teams/red")).unwrap();
        fs::write(&main, "include = [\"teams/*/tenants.toml\", \"absent/x.toml\"]\n").unwrap();
        let first = sources(&main);
        for folder in ["", "teams", "teams/red"] {
            assert!(first.folders.contains(&home.path().join(folder)), "{folder}: {first:?}");
        }
    }
}
