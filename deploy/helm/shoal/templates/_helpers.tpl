{{- define "shoal.name" -}}
{{- if contains "shoal" .Release.Name }}{{ .Release.Name }}{{ else }}{{ printf "%s-shoal" .Release.Name }}{{ end }}
{{- end }}

{{- define "shoal.selector" -}}
app.kubernetes.io/name: shoal
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "shoal.labels" -}}
{{ include "shoal.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{- define "shoal.image" -}}
{{- with .Values.image }}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end }}
{{- end }}

{{- define "shoal.socketDirectory" -}}
{{ .Values.containerd.socketDirectory | default (eq .Values.platform "k3s" | ternary "/run/k3s/containerd" "/run/containerd") }}
{{- end }}

{{- define "shoal.root" -}}
{{ .Values.containerd.root | default (eq .Values.platform "k3s" | ternary "/var/lib/rancher/k3s/agent/containerd" "/var/lib/containerd") }}
{{- end }}

{{- define "shoal.configDirectory" -}}
{{ .Values.containerd.configDirectory | default (eq .Values.platform "k3s" | ternary "/var/lib/rancher/k3s/agent/etc/containerd" "/etc/containerd") }}
{{- end }}

{{/* config.yaml. What `config` says counts before what the other values make. */}}
{{- define "shoal.config" -}}
{{- $service := printf "%s/%s" .Release.Namespace (include "shoal.name" .) }}
{{- $name := printf "%s.%s.svc:5002" (include "shoal.name" .) .Release.Namespace }}
{{- $config := dict "store" "containerd" "bootstrap" (list (printf "kubernetes:%s" $service) $name) }}
{{- $listen := dict }}
{{- if ne (int .Values.ports.local) 5001 }}{{ $_ := set $listen "local" (printf "127.0.0.1:%d" (int .Values.ports.local)) }}{{ end }}
{{- if ne (int .Values.ports.admin) 9090 }}{{ $_ := set $listen "admin" (printf "127.0.0.1:%d" (int .Values.ports.admin)) }}{{ end }}
{{- if .Values.metrics.enabled }}{{ $_ := set $listen "metrics" (printf "%s:%d" .Values.metrics.address (int .Values.metrics.port)) }}{{ end }}
{{- if $listen }}{{ $_ := set $config "listen" $listen }}{{ end }}
{{- if .Values.containerd.socketDirectory }}{{ $_ := set $config "containerd" (dict "address" (printf "%s/containerd.sock" .Values.containerd.socketDirectory)) }}{{ end }}
{{- if .Values.containerd.configDirectory }}{{ $_ := set $config "certsDir" (printf "%s/certs.d" .Values.containerd.configDirectory) }}{{ end }}
{{- if eq .Values.platform "k3s" }}{{ $_ := set $config "sharing" "on" }}{{ end }}
{{- if .Values.nodeReadyLabel }}{{ $_ := set $config "kubernetes" (dict "readyLabel" .Values.nodeReadyLabel) }}{{ end }}
{{- if .Values.token.secret }}{{ $_ := mergeOverwrite $config (dict "tokenFile" "/run/secrets/shoal/token" "tokenRequired" true) }}{{ end }}
{{- if .Values.registries.secret }}{{ $_ := set $config "registries" "/run/secrets/registries/registries.yaml" }}{{ end }}
{{- toYaml (mergeOverwrite $config (deepCopy .Values.config)) }}
{{- end }}

{{/* On a node: root, for containerd's socket and files are root's, without any of root's rights. */}}
{{- define "shoal.securityContext" -}}
runAsUser: 0
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* What only some clusters have, in each of the daemon's containers. */}}
{{- define "shoal.extraMounts" -}}
{{- if eq .Values.platform "k3s" }}
# registries.yaml, and what K3s itself is told.
- name: k3s
  mountPath: /etc/rancher/k3s
  readOnly: true
{{- end }}
{{- if .Values.token.secret }}
- name: token
  mountPath: /run/secrets/shoal
  readOnly: true
{{- end }}
{{- if .Values.registries.secret }}
- name: registries
  mountPath: /run/secrets/registries
  readOnly: true
{{- end }}
{{- end }}
