{{/* Names, labels and selectors. */}}

{{- define "lightqwen.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 46 | trimSuffix "-" -}}
{{- end -}}

{{/* 46 characters: every suffix, and the suffixes that controllers add, still fit into 63. */}}
{{- define "lightqwen.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 46 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "lightqwen.name" . -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 46 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 46 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* A LeaderWorkerSet makes a headless Service of its own name, so it must not have that of ours. */}}
{{- define "lightqwen.workloadName" -}}
{{- include "lightqwen.fullname" . }}{{ if include "lightqwen.multiNode" . }}-nodes{{ end -}}
{{- end -}}

{{- define "lightqwen.workloadKind" -}}
{{ if include "lightqwen.multiNode" . }}LeaderWorkerSet{{ else }}Deployment{{ end }}
{{- end -}}

{{- define "lightqwen.workloadApiVersion" -}}
{{ if include "lightqwen.multiNode" . }}leaderworkerset.x-k8s.io/v1{{ else }}apps/v1{{ end }}
{{- end -}}

{{- define "lightqwen.multiNode" -}}
{{ if gt (int .Values.engine.nodes) 1 }}true{{ end }}
{{- end -}}

{{- define "lightqwen.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "lightqwen.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "lightqwen.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "lightqwen.identity" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: lightqwen
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "lightqwen.identity" -}}
app.kubernetes.io/name: {{ include "lightqwen.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{/* Every pod of the server; the pod of `helm test` has another component. */}}
{{- define "lightqwen.selectorLabels" -}}
{{ include "lightqwen.identity" . }}
app.kubernetes.io/component: server
{{- end -}}

{{/* The pods that take requests: of several nodes, the leader's. */}}
{{- define "lightqwen.servingLabels" -}}
{{ include "lightqwen.selectorLabels" . }}
{{- if include "lightqwen.multiNode" . }}
leaderworkerset.sigs.k8s.io/worker-index: "0"
{{- end }}
{{- end -}}

{{- define "lightqwen.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ default (printf "%s-%s" .Chart.AppVersion .Values.engine.device) .Values.image.tag }}
{{- end -}}
{{- end -}}

{{/* Whether an object is wanted whose kind the cluster may not know. Arguments: root, enabled, api. */}}
{{- define "lightqwen.wanted" -}}
{{- if eq (toString .enabled) "auto" -}}
{{ if .root.Capabilities.APIVersions.Has .api }}true{{ end }}
{{- else if .enabled -}}
true
{{- end -}}
{{- end -}}

{{/* The rules know every server by job="lightqwen"; the scaler knows those of one release by `release`. */}}
{{- define "lightqwen.relabelings" -}}
- {targetLabel: job, replacement: lightqwen}
- {targetLabel: release, replacement: {{ .Release.Name | quote }}}
{{- end -}}
